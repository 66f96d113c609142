"""A script that kills its own children, for tests of what goes on after SIGKILL."""

from __future__ import annotations

from textwrap import indent

# argv: pipeline, recipe as JSON, prompts as JSON, folder, number of kills. Every kill is of a process of its own, at a
# random share of the processor time that undisturbed work takes; then the work is started again. The first run may take
# longer than the others (it compiles Python, reads files anew): work that ended before its kill tells the time anew and
# is tried again. Prints the exit codes of all tries.
_SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from s2p_deploy.families import resolve_base
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import Prompt, PromptSet
{imports}

torch.set_num_threads(1)  # and none to lose in a fork
base = resolve_base(sys.argv[1])
recipe = recipe_from_data(json.loads(sys.argv[2]), "test")
prompts = PromptSet(tuple(Prompt(*pair) for pair in json.loads(sys.argv[3])))
{setup}

def started(out):
    child = os.fork()
    if child == 0:
{work}
        os._exit(0)
    return child

def ended(child):
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime

def spent(child):
    fields = Path(f"/proc/{{child}}/stat").read_text().rpartition(")")[2].split()
    return "Z" if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

def wait_until_spent(child, seconds):
    while (now := spent(child)) != "Z" and now < seconds:
        time.sleep(0.001)

def started_anew(out):
    code, seconds = ended(started(out))
    assert code == 0
    return seconds

kills = int(sys.argv[5])
whole = started_anew(Path(sys.argv[4]) / "0")
moments, codes = random.Random(0), []
while codes.count(-signal.SIGKILL) < kills and len(codes) < 3 * kills:
    out = Path(sys.argv[4]) / str(len(codes) + 1)
    child = started(out)
    wait_until_spent(child, moments.uniform(0, 0.9) * whole)  # processor time: a busy machine's clock varies
    os.kill(child, signal.SIGKILL)
    code, seconds = ended(child)
    codes.append(code)
    whole = min(whole, seconds) if code == 0 else whole
    started_anew(out)
print(json.dumps(codes))
"""


def kill_script(*, imports: str, setup: str, work: str) -> str:
    """The script; ``work`` makes something at ``out`` from ``base``, ``recipe`` and ``prompts``."""
    return _SCRIPT.format(imports=imports, setup=setup, work=indent(work, " " * 8))
