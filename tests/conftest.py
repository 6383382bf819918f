"""Makes the scripts importable from anywhere; keeps out what differs from shell to shell: GPUs, the hub, ranks."""
import os
import sys
from pathlib import Path

os.environ |= dict(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")     # before torch and huggingface_hub are imported
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
