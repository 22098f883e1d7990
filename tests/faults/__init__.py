"""Real faults: processes that are killed, stopped and told to end, disks that refuse, files that lie.

``python -m tests.faults`` runs all of them, the slow half that the suite leaves out included, and prints which fault is seen by
which test.
"""
