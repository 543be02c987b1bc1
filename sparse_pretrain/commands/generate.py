"""`generate`: text from a trained model."""

import argparse
import json

from sparse_pretrain.commands import errors, status
from sparse_pretrain.commands import eval as scoring

EXAMPLES = """examples:
  sparse-pretrain generate --prompt='def main('
  sparse-pretrain generate --workdir=runs/quickstart --temperature=0 --tokens=64
  sparse-pretrain generate --prompt='import ' --top-p=0.9 --seed=3
  sparse-pretrain generate --prompt='import ' --checkpoint=best
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command's options; what is left out is as the run's own sample was written."""
    scoring.add_workdir(parser)
    parser.add_argument("--prompt", help="the text to continue (default: the run's sample prompt)")
    parser.add_argument("--tokens", type=int, metavar="N", help="how many tokens at most")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this mass"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation."""
    path = scoring.workdir(args)
    if not 0 <= args.seed < 2**32:
        raise errors.Usage(f"--seed: must be from 0 to 2**32 - 1, got {args.seed}")
    if args.tokens is not None and args.tokens < 1:
        raise errors.Usage(f"--tokens: must be at least 1, got {args.tokens}")
    if args.temperature is not None and not 0 <= args.temperature < float("inf"):
        raise errors.Usage(f"--temperature: must be 0 or more, got {args.temperature}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise errors.Usage(f"--top-p: must be in (0, 1], got {args.top_p}")
    from sparse_pretrain.interop import generate
    from sparse_pretrain.training import loop, trained

    loop.run.prepare_process()
    with status(f"opening {path}"):
        opened = trained.open_run(path, args.checkpoint)
    section = opened.experiment.sample
    chosen = {
        "tokens": args.tokens or section.tokens or 96,
        "temperature": section.temperature if args.temperature is None else args.temperature,
        "top_p": section.top_p if args.top_p is None else args.top_p,
        "seed": args.seed,
    }
    prompt = section.prompt if args.prompt is None else args.prompt
    with status("writing"):
        text = generate.generate(
            opened.definition,
            opened.params,
            opened.prices,
            trained.tokenizer(opened),
            prompt,
            **chosen,
        )
    if args.json:
        print(json.dumps({"prompt": prompt, "text": text, "step": opened.step, **chosen}, indent=1))
    else:
        print(prompt + text)
    return 0
