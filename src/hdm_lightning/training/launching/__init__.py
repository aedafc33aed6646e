"""How the processes of a run come to life, and end together."""
