"""The example on Ray: prompts mapped over ComfyUI workers, of which one dies, with nothing lost and nothing twice."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "ray"
ray = pytest.importorskip("ray", reason="ray is not installed: it is the requirement of examples/ray alone")
FLAGS = ("--cpu", "--disable-all-custom-nodes")


@pytest.fixture
def farm(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import farm

    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(EXAMPLE), *filter(None, sys.path)])}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    yield farm
    ray.shutdown()


def prompt(width, node="EmptyLatentImage"):
    return {
        "empty": {"class_type": node, "inputs": {"width": width, "height": 64, "batch_size": 1}},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["empty", 0], "filename_prefix": f"of_{width}"}},
    }


def test_a_worker_that_dies_is_replaced_and_each_prompt_has_its_one_result(farm, tmp_path):
    class Mortal(farm.Worker):
        """Whose ComfyUI is killed under the first prompt of 128 pixels."""

        def run(self, prompt):
            width, killed = prompt["empty"]["inputs"]["width"], tmp_path / "killed"
            with (tmp_path / "runs").open("a") as runs:
                runs.write(f"{width}\n")
            if width == 128 and not killed.exists():
                killed.touch()
                self._comfyui.kill()
            return super().run(prompt)

    actor = ray.remote(Mortal)
    user = str(tmp_path / "user")

    def make():
        return actor.remote(os.environ["COMFYUI_PATH"], sys.executable, FLAGS, user)

    prompts = [prompt(64), prompt(128), prompt(192, node="NoSuchNode"), prompt(256), prompt(320)]
    found = list(farm.run_all(prompts, make, 2))
    results = dict(found)
    assert sorted(number for number, _ in found) == [0, 1, 2, 3, 4]
    assert isinstance(results[2], farm.PromptFailed) and "NoSuchNode" in str(results[2])
    for number, width in ((0, 64), (1, 128), (3, 256), (4, 320)):
        (name,) = results[number]
        assert name.startswith(f"of_{width}_") and len(results[number][name]) > 64
    runs = Counter((tmp_path / "runs").read_text().split())
    assert runs == {"64": 1, "128": 2, "192": 1, "256": 1, "320": 1}
    farm.keep(tmp_path, 1, results[1])
    assert next(tmp_path.glob("00001-of_128_*")).read_bytes() == next(iter(results[1].values()))
