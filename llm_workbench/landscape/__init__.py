"Which models there are, and what their numbers really say."
