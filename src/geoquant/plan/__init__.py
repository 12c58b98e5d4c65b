"""The plan: what each site gets, decided before anything is solved."""
