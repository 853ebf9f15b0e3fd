"""docs/python.md as it stands there: its examples run in order, in one process, with a real worker."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machine import Ganq

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_examples_of_the_manual_run_and_the_generator_gives_the_jobs_pixels(
    ganq: Ganq, redis_url: str, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(faces, tmp_path / "faces")
    monkeypatch.chdir(tmp_path)
    ganq.start_worker()
    examples = EXAMPLE.findall(PAGE.read_text())
    assert len(examples) >= 10
    names: dict[str, Any] = {}
    for example in examples:
        code = compile(example, str(PAGE), "exec")
        exec(code, names)
    by_job = np.stack([image.to_numpy() for image in names["first"].images()])
    assert np.array_equal(names["batch"], by_job)
    assert names["images"].shape == (4, 3, 16, 16)
    assert names["pil_image"].size == (16, 16)
    path = tmp_path / "home" / "volume"
    assert names["data"] in {file.read_bytes() for file in path.glob("jobs/*/a1/images/*.png")}
    names["client"].close()
