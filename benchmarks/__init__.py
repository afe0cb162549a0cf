import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as run.py does
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
