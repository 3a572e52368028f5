"""What a run is: settings, errors that stop it, and the memory plan. Imports nothing of ours."""
