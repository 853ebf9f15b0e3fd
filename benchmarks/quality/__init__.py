"""Better pictures from few images: each recipe beside the origin, at equal time, through ganq's queue."""
