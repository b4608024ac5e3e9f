"""What a `model.fit` user touches: `GSNRModel`, `GSNRCallback` and schedules."""
