//! The command `metazoa`: everything is in [`metazoa::cli`].

fn main() -> std::process::ExitCode {
    metazoa::cli::main()
}
