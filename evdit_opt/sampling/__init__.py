"""Few-step sampling: noise levels, where to place the steps, the scheduler, measuring a placement.

``evdit_opt.scheduler`` offers the scheduler to users. Of this package only few_step.py and
measure.py need diffusers.
"""
