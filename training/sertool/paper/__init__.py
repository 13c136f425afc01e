"""The paper's experiment on a corpus of one's own: a sweep of trainings, its tables and its figures."""
