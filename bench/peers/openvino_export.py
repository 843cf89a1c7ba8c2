"""FOLDER OUT bf16|int8: a Hugging Face checkpoint as OpenVINO IR with its tokenizer (runs where optimum-intel is installed)."""

import subprocess
import sys
from pathlib import Path

folder, out, precision = sys.argv[1:]
command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "--model", folder, "--task"]
weights = {"bf16": "fp16", "int8": "int8"}[precision]
raise SystemExit(subprocess.call([*command, "text-generation-with-past", "--weight-format", weights, out]))
