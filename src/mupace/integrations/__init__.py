"""What other trainers need beyond the Pacer itself. Import the one you use: `mupace.integrations.hf`."""
