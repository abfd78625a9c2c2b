#!/usr/bin/env python3
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "ia_gcn/__init__.py").read_text())[1]

setup(
    name="ia_gcn",
    version=VERSION,
    description="Multi-label image recognition on detectron2: IA-GCN, ML-AGCN and their baselines",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["ia_gcn", "ia_gcn.*"]), "ia_gcn.configs"],
    # The configs are part of the package; see ia_gcn.config.find_config.
    package_dir={"ia_gcn.configs": "configs"},
    package_data={"ia_gcn.configs": ["**/*.yaml"], "ia_gcn.evaluation": ["report_page/*"]},
    # Beside the package, whose import takes seconds.
    py_modules=["ia_gcn_cli"],
    entry_points={"console_scripts": ["ia-gcn = ia_gcn_cli:main"]},
    python_requires=">=3.9",
    # detectron2 is not on PyPI: keep the build you have, or run tools/install_detectron2.py.
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.23",
        "scipy>=1.9",
        "scikit-learn>=1.1",
        "opencv-python-headless>=4.6",
        "Pillow>=9.2",
        "matplotlib>=3.6",
        "fvcore>=0.1.5",
        "iopath>=0.1.7",
        "Jinja2>=3.0",
        "pycocotools>=2.0.2",
        "safetensors>=0.4",
        "simplejpeg>=1.7",
        "tabulate",
        "tensorboard",
        "timm>=1.0",
        "tqdm",
        "yacs>=0.1.8",
    ],
    extras_require={
        "bench": ["torchmetrics>=1.0"],
        "clean": ["cleanlab>=2.7.1"],
        "demo": ["gradio>=6.31"],
        "dev": ["hypothesis", "pytest", "pytest-xdist", "ruff", "webdataset>=1.0"],
        # To run what was exported, onnxruntime alone will do.
        "export": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.6"],
        # For tools/predict_distributed.py. Ray 2.49 to 2.54 unpickle what is in a Parquet file.
        "ray": ["ray[data]>=2.60"],
        # To make tar shards; a training reads them without.
        "shards": ["webdataset>=1.0"],
    },
)
