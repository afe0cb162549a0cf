import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as run.py does: threads that spin make a busy machine slower
