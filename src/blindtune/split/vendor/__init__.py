"""What only the vendor runs: one frozen model, its customers' jobs, and the service around them.

`handler` answers the messages of a stream: `session` and `admission` check them, `job_book`, `job`
and `store` keep jobs, `shared_model`, `lora`, `open_forwards` and `turns` do the work. `service`
puts it behind TLS: `door` says who may come in; `endpoint`, `metrics` and `event_log` tell how it
goes. Nothing here knows of privatizers or of a customer's code.
"""
