"""bin/gpu: what it refuses, and that a page is never made of a rehearsal. .ci/run rehearses the stages themselves on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def gpu(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "bin/gpu", *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "bin/gpu bundle, or bin/gpu run STAGE..."),
        (("fly",), "bin/gpu does not know 'fly'"),
        (("run",), "no stage is named"),
        (("run", "bench", "fly"), "there is no stage 'fly'"),
        (("bundle", "--fly"), "bin/gpu bundle does not know '--fly'"),
    ],
)
def test_what_it_does_not_know(words, told):
    result = gpu(*words)
    assert result.returncode == 1 and told in result.stderr


def report(folder: Path, page: Path) -> subprocess.CompletedProcess:
    program = f"import sys, gpu; from pathlib import Path; gpu.PAGE = Path({str(page)!r}); gpu.main()"
    return subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bin/reports")])},
    )  # fmt: skip


def test_the_page_names_the_gpu_and_holds_the_figures(tmp_path):
    facts = dict.fromkeys(("cudnn", "nccl", "python", "torch"), "1") | {"gpu": None, "gpus": 0, "cpu_cores": 2}
    (tmp_path / "machine.json").write_text(json.dumps(facts))
    page = tmp_path / "gpu.md"
    refused = report(tmp_path, page)
    assert refused.returncode == 1 and "no figures of a GPU" in refused.stderr and not page.exists()
    (tmp_path / "machine.json").write_text(json.dumps(facts | {"gpu": "Some GPU", "gpus": 1}))
    row = {"case": "dense", "precision": "tf32", "batch": 128, "launch_ms": 1.0, "step_ms": 2.0, "tflops_per_second": 9.0}
    rows = [row | {"side": "ours", "streamed_ms": 3.0}, row | {"side": "plain", "streamed_ms": 4.0}]
    (tmp_path / "bench.json").write_text(json.dumps(rows))
    checked = {"placement": {"ok": True, "said": "here", "problems": {}, "seconds": 1}}
    for ranks in (1, 2):
        (tmp_path / f"checks-{ranks}.json").write_text(json.dumps(checked))
    assert report(tmp_path, page).returncode == 0
    text = page.read_text()
    assert "**Some GPU**" in text and "| placement | ok | ok | here |" in text
    assert "| dense | ours | tf32 | 128 | 1.00 | 2.00 | 3.00 | 9.0 | 0.75 | 1.00 |" in text
