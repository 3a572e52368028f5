"""The routes for operators: models and health, metrics, the prefix cache, the memory plan."""
