"""From folders of runs to tables, figures and verdicts. The way of `python -m analysis.report NAME`:

runs.py reads the folders (metrics.py their lines, wandb_runs.py and offline_files.py what wandb has) and says which
runs may stand in one mean; behind.py puts every one with its figures and origin into runs.csv. From that file alone
summary.py makes a row an arm (additive_model.py, dunnett.py, statistics.py, variation.py), tables.py what is printed,
notes.py what stands above and under it. figures.py draws (against.py, layout.py). --explain is explain.py (inside.py,
explain_figures.py); the report of sweeps=tune is trials.py, from what ledger.py found.

verdicts.py goes through claims.yaml, whose parts claims.py reads and contrasts.py examines; sweeps.py and pack.py are
commands of their own. What a table asks stands in declared.yaml, what a label looks like in style.yaml (arms.py reads
both), published numbers in published.yaml.
"""
