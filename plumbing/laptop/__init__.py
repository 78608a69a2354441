"""What keeps a run going on the laptop; alone may import pandas, wandb and matplotlib. Imports common."""
