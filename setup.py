"""Package metadata. Detectron2 is not pulled in: the one that the user has is the right one."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="atss-detectron2",
    version="0.1.0",
    description="ATSS and its relatives: one-stage object detection on Detectron2",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "projects/ATSS"},
    packages=find_packages("projects/ATSS"),
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "numpy",
        "fvcore>=0.1.5",
        "pycocotools",
        "opencv-python",
    ],
    extras_require={
        "demo": ["matplotlib", "scikit-learn", "tqdm"],
        "test": ["pytest", "ruff"],
    },
)
