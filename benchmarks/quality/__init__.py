"""Better images from few: each recipe beside dcgan (the tutorial), at equal time, through ganq's queue."""
