"""plan=auto: the planner's first choice for the devices at hand that can train the run."""

import dataclasses
import json
import math

import jax
import pytest

from sparse_pretrain import cli, config
from sparse_pretrain.planning import chips, planner
from sparse_pretrain.sharding import mesh
from sparse_pretrain.training import auto
from tests.training import processes as runs


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    file = tmp_path_factory.mktemp("auto") / "tiny.py"
    file.write_text(runs.CONFIG)
    return config.resolve(str(file), ["plan=auto"])


@pytest.fixture
def fleet(monkeypatch):
    """Eight of a chip that nobody measures."""
    whole = chips.Chip("cpu", (), 1e11, 0, 8e9, 2e10, 2e10, 2e10, 1, 0, 0, "made up")
    monkeypatch.setattr(chips, "here", lambda: whole)
    found = chips.at_hand()
    assert (found.count, found.chip.memory) == (8, 1e9)
    assert chips.parse("cpu:8") == found
    return found


def test_the_choice_is_the_planners_first_and_every_further_one_divides(asked, fleet):
    size = 65 if asked.model.vocab else auto.data.vocab(asked.data, seed=asked.seed)
    model = dataclasses.replace(asked.model, vocab=size)
    problem = planner.Problem(dataclasses.replace(asked, plan="single", model=model), fleet)
    first = planner.chosen(planner.Planner(problem))[0]
    found = list(auto.choices(asked, fleet))
    assert [found[0][f] for f in auto.FIELDS] == [
        first.plan, first.mesh, first.micro, first.remat,
    ]  # fmt: skip
    assert len({told["plan"] for told in found}) > 3
    for told in found:
        assert math.prod(mesh.parse(told["mesh"]).values()) == 8
        assert asked.data.batch % told["accumulate"] == 0


def test_the_run_is_given_what_was_chosen(asked, fleet):
    got, said = auto.planned(asked)
    told = next(auto.choices(asked, fleet))
    assert (got.plan, got.mesh, got.accumulate) == (told["plan"], told["mesh"], told["accumulate"])
    assert got.model.remat == told["remat"]
    assert said == told["said"]
    assert "of 1 on each of 8 x cpu" in said
    assert auto.planned(got) == (got, "")


def test_what_cannot_be_planned_is_refused_in_one_line(asked, fleet):
    for changes, says in (
        ({"mesh": "fsdp=8"}, r"^config.mesh: 'fsdp=8' is given, and plan auto chooses the mesh$"),
        ({"data": dataclasses.replace(asked.data, batch=15)}, r"deals 15 rows .* 8 x cpu; .*=16"),
    ):
        with pytest.raises(ValueError, match=says) as e:
            auto.planned(dataclasses.replace(asked, **changes))
        assert "\n" not in str(e.value)
    small = chips.Fleet(dataclasses.replace(fleet.chip, memory=1e3), 8)
    with pytest.raises(ValueError, match=r"holds 0.00\d+ GB on each of 8 x cpu and there"):
        next(auto.choices(asked, small))


@pytest.mark.slow
def test_a_run_trains_under_its_choice_and_says_so(tmp_path, capsys):
    file, workdir = tmp_path / "tiny.py", tmp_path / "run"
    file.write_text(runs.CONFIG)
    assert cli.main(["train", f"--config={file}:2", "--plan=auto", f"--workdir={workdir}"]) == 0
    assert "plan auto: " in capsys.readouterr().out
    record = json.loads((workdir / "run.json").read_text())["config"]
    assert record["plan"] != "auto"
    assert math.prod(mesh.parse(record["mesh"]).values()) == jax.device_count()
