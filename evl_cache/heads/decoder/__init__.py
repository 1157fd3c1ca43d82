"""The EVL decoder: its modules, its fast forward and backward pass, and its plain twin."""
