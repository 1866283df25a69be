"""Scripts of others, run with the DDF-ResNets in timm's registry."""

import json
import subprocess
import sys

import pytest

from ddf_convert.models.launch import main

SCRIPT = """
import json
import sys

import neighbor
import timm
import torch

with torch.device("meta"):
    model = timm.create_model("ddf_mul_resnet18")

class Picklable:
    pass

if __name__ == "__main__":
    import __main__
    print(json.dumps({
        "arguments": sys.argv,
        "parameters": sum(p.numel() for p in model.parameters()),
        "neighbor": neighbor.VALUE,
        "is_main": __main__.Picklable is Picklable,
    }))
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_script_runs_as_python_would_run_it(tmp_path):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "train.py").write_text(SCRIPT)
    (scripts / "neighbor.py").write_text("VALUE = 7\n")
    arguments = ["scripts/train.py", "3", "--model", "ddf_mul_resnet18", "-h"]
    command = [sys.executable, "-m", "ddf_convert.models.launch", *arguments]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 3, ran.stderr
    assert json.loads(ran.stdout) == {
        "arguments": arguments,
        "parameters": 7_691_032,
        "neighbor": 7,
        "is_main": True,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no script was given"),
        (("missing.py", "--model", "x"), "missing.py: no such script"),
        (("--model",), "--model: no such script"),
        ((".",), ".: is a folder"),
    ],
)
def test_without_a_script_there_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err
