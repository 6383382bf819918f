"""Makes the scripts importable from anywhere; keeps out what differs from shell to shell: GPUs, the hub, ranks,
threads, whose number changes the last bits of a sum."""
import os
import sys
from pathlib import Path

# before torch and huggingface_hub are imported
os.environ |= dict(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
