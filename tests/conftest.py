import os

# Tests never ask a hub; without this every missing folder costs many seconds of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
