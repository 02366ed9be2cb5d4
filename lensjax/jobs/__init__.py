"""Jobs: what choosing a model and tuning one share, from the request to the process that trains a candidate."""
