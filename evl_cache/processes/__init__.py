"""The processes of one run: which one this is, what they tell each other, how they are stopped, what they may use."""

from evl_cache.processes.group import Processes, ToldElsewhere, processes_of_environment
from evl_cache.processes.memory import (
    MEMORY_SHARE,
    available_bytes,
    give_back_memory,
    giving_back_memory,
    peak_bytes,
    reset_peak,
)
from evl_cache.processes.place import ProcessPlace
from evl_cache.processes.processors import (
    limit_torch_threads,
    sharing_processors,
    single_threaded,
    usable_cpus,
)
from evl_cache.processes.rendezvous import Rendezvous
from evl_cache.processes.shares import local_processes, processor_share
from evl_cache.processes.sharing import shared_memory, sharing_groups
from evl_cache.processes.software import device_name, package_versions, training_environment
from evl_cache.processes.stop_requests import Interrupted, StopRequests
