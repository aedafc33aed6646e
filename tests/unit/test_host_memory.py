"""Freed memory is reused from step to step."""

import subprocess
import sys

CODE = """
import resource, sys, torch
from hdm_lightning.training.hardware import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
net = torch.nn.Sequential(torch.nn.Linear(256, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 256))
def step(): net(torch.ones(1000, 256)).sum().backward()
for _ in range(20): step()
before = faults()
for _ in range(10): step()
print(faults() - before)
"""


def faults(mode):
    return int(subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True).stdout)


def test_a_step_of_40_mb_causes_next_to_no_page_faults():
    # 10,000 pages are touched a step; without the setting about 1,000 to 4,000 of them fault on most runs.
    assert faults("keep") / 10 < 400
