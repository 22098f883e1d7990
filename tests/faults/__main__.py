"""``python -m tests.faults``: every fault that a run should survive or name, and the tests that bring it about.

    python -m tests.faults [NUMBER ...] [--list]
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml

RUN, TWO, ONE, CHECK = "tests/test_run.py", "tests/faults/test_processes.py", "tests/faults/test_runs.py", "tests/test_checkpoint.py"
BUCKET = "tests/faults/test_bucket.py"
FAULTS = {
    1: ("SIGKILL at random moments, inside a save too: the end is bitwise the same",
        f"{RUN}::test_killed_at_random_moments_it_ends_bitwise_the_same", f"{CHECK}::test_sigkill_at_any_moment_leaves_a_good_checkpoint",
        "tests/test_finetune.py::test_killed_before_its_end_it_chooses_the_same",
        f"{BUCKET}::test_killed_while_it_sends_a_run_ends_in_the_bucket_as_on_a_disk",
        f"{BUCKET}::test_two_processes_without_a_common_folder_are_killed_in_a_save_and_end_as_on_a_disk"),
    2: ("SIGTERM, to one of two as well: saved, exit code 42, no orphans; a second one spoils nothing",
        f"{RUN}::test_a_signal_saves_and_exits_42", f"{TWO}::test_two_processes_stop_together_and_one_goes_on",
        f"{ONE}::test_a_second_signal_ends_at_once_and_spoils_nothing", "tests/test_data_reader.py::test_an_unguarded_script_runs_and_no_process_outlives_it"),
    3: ("a newest checkpoint that is torn: the one before it, and why", f"{CHECK}::test_damage_falls_back_and_says_why",
        f"{CHECK}::test_damaged_step_is_written_again_under_its_name", f"{CHECK}::test_nothing_good_is_reported_as_such"),
    4: ("a flipped bit in a committed checkpoint", f"{CHECK}::test_every_byte_of_a_checkpoint_is_guarded",
        f"{RUN}::test_damaged_checkpoints_fall_back_and_say_why"),
    5: ("a disk that refuses during a save", f"{ONE}::test_a_disk_that_refuses_for_a_while_costs_saves_alone",
        f"{ONE}::test_a_disk_that_stays_full_stops_the_run_and_keeps_what_was_good", f"{CHECK}::test_background_failure_surfaces",
        "tests/test_bucket.py::test_two_processes_save_fail_and_restore_together"),
    6: ("resumed on other devices, processes and rule sets", f"{ONE}::test_a_run_goes_on_on_other_devices_under_other_rules",
        f"{TWO}::test_two_processes_train_and_resume_as_one", f"{CHECK}::test_state_comes_back_on_any_number_of_devices", f"{CHECK}::test_two_processes_agree"),
    7: ("resumed with frozen parts, adapters, averages: every leaf comes back, none silently fresh",
        f"{RUN}::test_frozen_parameters_are_written_once_and_come_back", f"{CHECK}::test_restore_is_strict_and_names_paths", "tests/test_finetune.py"),
    8: ("data changed on resume: refused key by key", f"{RUN}::test_a_changed_config_is_refused_key_by_key"),
    9: ("images that cannot be read", "tests/test_data_ops.py::test_unreadable_images_have_a_reason",
        "tests/test_data_pipeline.py::test_bad_samples_are_replaced_counted_and_written_down",
        "tests/test_data_pipeline.py::test_budget_stops_the_run_at_the_same_step"),
    10: ("a small file with a huge image",
         "tests/test_data_ops.py::test_unreadable_images_have_a_reason", "tests/test_data_ops.py::test_pixel_limit_is_an_option"),
    11: ("damaged tars", "tests/test_data_tars.py"),
    12: ("bad text", "tests/test_data_sources.py::test_captions_that_cannot_be_used_have_a_reason", "tests/test_data_tokenizers.py"),
    13: ("data that stalls: named", f"{TWO}::test_a_reader_that_hangs_is_named", "tests/test_data_tars.py::test_names_expand_and_misses_name_the_nearest"),
    14: ("less data than a batch, fewer samples than readers", f"{ONE}::test_less_data_than_a_batch_and_fewer_samples_than_readers",
         f"{ONE}::test_every_sample_is_evaluated_once_by_some_process"),
    15: ("a reader process killed",
         "tests/test_data_reader.py::test_a_killed_process_stops_the_run", f"{TWO}::test_a_reader_that_dies_in_one_process_ends_both"),
    16: ("a loss or gradient that is not finite", "tests/test_step.py::test_a_step_that_is_not_finite_changes_only_the_counters",
         f"{RUN}::test_a_loss_that_stays_infinite_stops_the_run"),
    17: ("a process that is dead or stopped: named, stacks, exit code 44", f"{TWO}::test_a_process_that_is_gone_is_named_with_stacks_and_44",
         "tests/test_launch.py::test_a_process_that_stays_alone_says_who_is_missing"),
    18: ("configs that cannot work", "tests/test_config.py", f"{ONE}::test_a_batch_that_does_not_divide_over_the_mesh_is_refused",
         f"{TWO}::test_processes_with_other_configs_are_refused"),
    19: ("two runs in one directory, or in one bucket", f"{RUN}::test_two_runs_in_one_directory_the_second_refuses",
         "tests/test_bucket.py::test_one_run_at_a_time", "tests/test_bucket.py::test_a_number_is_won_by_one_alone",
         "tests/test_bucket.py::test_who_finds_another_run_or_no_bucket_ends_all"),
    20: ("files that lie", "tests/test_importers_read.py", "tests/test_data_tars.py::test_unsafe_members_are_refused"),
}


def main(argv):
    numbers = [int(a) for a in argv if a.isdigit()] or list(FAULTS)
    if "--list" in argv:
        for number in numbers:
            print(f"{number:2}  {FAULTS[number][0]}", *(f"      {test}" for test in FAULTS[number][1:]), sep="\n")
        return 0
    tests = list(dict.fromkeys(test for number in numbers for test in FAULTS[number][1:]))
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        code = subprocess.run([sys.executable, "-m", "pytest", "-m", "slow or not slow", "-n", "1", f"--junitxml={file.name}", *tests]).returncode
        cases = [(f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}", float(case.get("time")),
                  next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"),
                  {p.get("name"): p.get("value") for p in case.iter("property")}) for case in xml.parse(file.name).iter("testcase")]
    for number in numbers:
        mine = [case for case in cases if any(case[0] == t or case[0].startswith((f"{t}[", f"{t}::")) for t in FAULTS[number][1:])]
        ran = [case for case in mine if case[2] != "skipped"]
        bad = [f"{name}: {outcome}" for name, _, outcome, _ in ran if outcome != "passed"]
        left = f", {len(mine) - len(ran)} skipped (reasons above)" if len(ran) < len(mine) else ""
        told = "".join(f"  {k}={v}" for *_, properties in mine for k, v in properties.items())
        print(f"{number:2}  {'ok' if ran and not bad else 'NOT OK'}  {FAULTS[number][0]}: {len(ran)} tests{left}, {sum(case[1] for case in mine):.0f} s, "
              f"the longest {max((case[1] for case in mine), default=0):.0f} s{told}", *(f"      {line}" for line in bad), sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
