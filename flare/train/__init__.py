"""The training loop and what it needs: loader, state, saving, resume, logging."""
