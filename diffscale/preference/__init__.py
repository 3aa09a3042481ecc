"""What people prefer: blind pairs on a web page, durable votes, and strengths with intervals."""
