"""Packaging of fewshot_d2."""

from setuptools import find_packages, setup

# detectron2 is required but not listed: it is not on PyPI under its own name, so pip could not
# find it. `make install` or tools/install_detectron2.py installs it.
REQUIREMENTS = [
    "torch>=2.1",
    "torchvision>=0.16",
    "numpy>=1.24",
    "Pillow>=9.1",
    "opencv-python-headless>=4.5",
    "pycocotools>=2.0.2",
    "fvcore>=0.1.5",
    "iopath>=0.1.7",
    "yacs>=0.1.8",
    "tqdm>=4.29",
    "tabulate>=0.8",
    "matplotlib>=3.5",
    "tensorboard>=2.9",
    "scikit-learn>=1.2",
    "scipy>=1.9",
]
EXTRAS = {
    "test": [
        "pytest>=7",
        "pytest-xdist>=3",
        "ruff>=0.6",
        "pytorch-metric-learning>=2.5",
        "scikit-image>=0.19",
        "faiss-cpu>=1.8",
    ],
    "timm": ["timm>=1.0"],
    "superpixels": ["scikit-image>=0.19"],
    "faiss": ["faiss-cpu>=1.8"],
}

setup(
    name="fewshot_d2",
    version="0.1.0",
    description="Few-shot object detection and segmentation on detectron2.",
    license="Apache-2.0",
    packages=find_packages(include=["fewshot_d2*"]),
    package_data={"fewshot_d2": ["**/*.json", "**/*.yaml", "**/*.txt"]},
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    # The doctor starts the command: it must speak where nothing else can be imported.
    entry_points={"console_scripts": ["fewshot-d2 = fewshot_d2_doctor:command"]},
)
