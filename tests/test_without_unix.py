"""What `skipcat run` and `skipcat engine` need is there without what Windows has not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.child_process import environment
from pipeline.folder_lock import LOCK_FILE
from tests.support.tiny_decoder import shared_export

ROOT = Path(__file__).parents[1]
START = [sys.executable, str(ROOT / "tests/support/without_unix.py")]
# Heavy ones that these two verbs do not import are left out.
RUN_PATH = ("engine", "export", "model", "runtime")


def there(*arguments: str, status: int = 0) -> str:
    """What a process without Unix's own modules and names says on stdout and stderr."""
    done = subprocess.run(
        [*START, *arguments], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def hold(output: Path) -> subprocess.Popen[str]:
    """Such a process, which works on an output until its input ends."""
    child = subprocess.Popen(
        [*START, "hold", str(output)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_every_module_of_the_run_path_is_imported() -> None:
    files = sorted((ROOT / "pipeline").glob("*.py"))
    for package in RUN_PATH:
        files += sorted((ROOT / "pipeline" / package).rglob("*.py"))
    files += [ROOT / "pipeline/cli/run.py", ROOT / "pipeline/cli/engine.py"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    names = [name.removesuffix(".__init__") for name in names if "__main__" not in name]
    assert {"pipeline.folder_lock", "pipeline.runtime.template_process"} <= {*names}
    there("import", *names)


def test_a_prompt_is_answered_through_its_chat_template() -> None:
    arguments = ["run", str(shared_export("opset24")), "-p", "hello", "--max-new-tokens", "5"]
    found = json.loads(there("main", *arguments, "--json").partition("}\n")[0] + "}")
    assert found["new_tokens"] == 5
    assert found["prompt_tokens"] == len("<user>hello\n<assistant>")


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "empty folder"])
def test_two_runs_of_one_output_know_of_each_other(is_there: bool, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if is_there:
        output.mkdir()
    child = hold(output)
    said = subprocess.run(
        [*START, "hold", str(output)], input="", capture_output=True, text=True, env=environment()
    )
    assert said.returncode != 0
    assert f"process {child.pid}" in said.stderr
    # The folder that is renamed holds no open file, which would forbid it there.
    assert not [path for path in tmp_path.rglob(LOCK_FILE)]
    child.communicate("")
    assert child.returncode == 0
    assert [path.name for path in output.iterdir()] == ["half.txt"]
    assert list(tmp_path.iterdir()) == [output]


def test_the_lock_of_a_killed_run_is_none(tmp_path: Path) -> None:
    child = hold(tmp_path / "out")
    child.kill()
    child.communicate()
    after = hold(tmp_path / "out")
    after.communicate("")
    assert after.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("source", "limits", "said"),
    [
        ("{% set n = 9 %}{{ n**(n**n) }}", ("0.3", "30"), "more than 0.3 s of the processor"),
        ("{% set n = 9 %}{{ n**(n**n) }}", ("30", "0.5"), "more than 0.5 s"),
        ("{{ messages[0].content * 10**9 }}", ("30", "30"), "more than 1024 MiB of memory"),
    ],
)
def test_a_template_that_takes_too_much_is_ended_by_the_parent(
    source: str, limits: tuple[str, str], said: str
) -> None:
    # 2 GB are written to, not only promised, so that they are seen.
    first, second, third = there("render", source, *limits).splitlines()
    assert (first, third) == ("fine", "fine")
    assert said in second
