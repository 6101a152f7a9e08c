"""What ours is measured against, written as a user of those libraries would, at their best."""
