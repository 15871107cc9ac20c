"""What only the customer runs: its private texts, what it makes of them, and its job.

The acts are `tuning_job`, `prediction` and `cancellation`. `labelled_text` and `private_texts` read
what never leaves, `privatizer_config` and `private_states` say and make what is sent,
`privacy_statement` tells what that promises. `access` reaches the vendor, `requests` and `ushape`
ask it, `job` is the job on the customer's disk. Nothing here knows of a vendor's code.
"""
