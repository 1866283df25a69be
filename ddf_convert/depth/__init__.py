"""Joint depth upsampling: pairs of photos and depth maps, training, upsampling, and how well it went."""
