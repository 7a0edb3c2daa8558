"""What people see of a checkpoint: badges, the browser, the layer map, the doctor."""
