//! Container engines with the runtime under test in the place of their own: Debian's podman and Docker, unchanged.
//!
//! The same tests run with both engines, and on `runc` (`RUNTIME=runc`) they prove themselves. They need the lab
//! (`lab up --image systemd`): they write `/etc/caisson` and start a Docker daemon.

#![allow(clippy::panic, reason = "a failed expectation is how a test fails")]

mod docker;
mod engine;
mod http;
mod names;
mod podman;
mod rootless;
mod server;
mod verbs;

/// Each test of `verbs`, once with each engine.
macro_rules! with_both {
    ($($test:ident),* $(,)?) => {
        mod both {
            mod podman {
                $(#[test] fn $test() { crate::verbs::$test(&crate::engine::Engine::podman()); })*
            }
            mod docker {
                $(#[test] fn $test() { crate::verbs::$test(&crate::engine::Engine::docker()); })*
            }
        }
    };
}

with_both!(
    output_and_exit_status_arrive,
    standard_input_arrives,
    a_program_that_is_not_there_is_named,
    volumes_are_shared_live,
    a_named_volume_outlives_its_container,
    limits_hold,
    a_user_without_capabilities_has_none,
    a_read_only_root_leaves_the_tmpfs_writable,
    names_and_environment_arrive,
    shared_memory_is_a_tmpfs_of_the_size_asked_for,
    the_engines_init_is_process_one,
    a_terminal_is_one,
    exec_runs_beside_the_program,
    exec_has_a_terminal_too,
    a_stopped_container_starts_again,
    attach_reaches_standard_input,
    files_are_copied_in_and_out,
    a_paused_container_stands_still,
    usage_is_measured,
    a_running_container_is_removed_by_force,
    a_published_port_is_reached,
    limits_are_changed,
    a_server_is_built_loaded_and_keeps_its_data,
);
