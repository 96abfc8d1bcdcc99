"""MiniSD, the small model that comes with the course: its parts, its pretraining, its model card, its weights.

`python -m helpers.minisd.pretrain` trains it; README.md beside this file says what it can do and what it cannot.
"""
