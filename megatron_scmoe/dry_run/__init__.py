"""What a run would need, found out without devices, data or processes: ``DRY_RUN=1 python pretrain_gpt_scmoe.py``."""
