"""What a record says of the machine."""

import os
import platform
import re
from pathlib import Path

from sparse_pretrain.training import record

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu vme avx2 avx512f avx512_bf16 amx_bf16 amx_tile

processor\t: 1
model name\t: another core
flags\t\t: fpu
"""
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd sve i8mm\nCPU part\t: 0xd4f\n"


def test_the_processor_as_linux_lists_it(tmp_path):
    (tmp_path / "x86").write_text(X86)
    found = record.processor(tmp_path / "x86")
    assert found["cpu"] == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert found["features"] == ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
    assert 1 <= found["usable_cores"] <= found["cores"] == os.cpu_count()
    (tmp_path / "arm").write_text(ARM)
    for name, features in (("arm", ["asimd", "sve", "i8mm"]), ("absent", [])):
        found = record.processor(tmp_path / name)
        assert found["cpu"] == (platform.processor() or platform.machine())
        assert found["features"] == features


def test_the_environment_names_this_machines_processor():
    device = record.environment()["device"]
    assert {"kind", "platform", "count", "host", "cpu", "cores"} <= set(device)
    path = Path("/proc/cpuinfo")
    names = re.findall(r"(?m)^model name\s*: (.*)$", path.read_text()) if path.exists() else []
    unlisted = platform.processor() or platform.machine()
    assert device["cpu"] == (names[0].strip() if names else unlisted)
