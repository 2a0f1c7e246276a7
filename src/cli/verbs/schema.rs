//! `metazoa schema`: the JSON schemas of files and results.

use std::path::PathBuf;

use clap::Args;

use crate::app::schemas;
use crate::cli::Outcome;
use crate::cli::printer::Printer;
use crate::error::{Error, Result};

/// Arguments of `schema`.
#[derive(Debug, Args)]
pub(crate) struct SchemaArgs {
    /// Print only this schema
    name: Option<String>,
    /// Write DIR/NAME.schema.json instead of printing
    #[arg(long, value_name = "DIR")]
    write: Option<PathBuf>,
}

/// Prints the schema called `name`, or all of them in one object.
pub(crate) fn run(args: &SchemaArgs, printer: &Printer) -> Result<Outcome> {
    let mut schemas = schemas::all();
    if let Some(name) = &args.name {
        let names: Vec<&str> = schemas.iter().map(|(name, _)| *name).collect();
        let names = names.join("`, `");
        schemas.retain(|(known, _)| known == name);
        if schemas.is_empty() {
            return Err(Error::usage(format!("no schema is called `{name}`"))
                .hint(format!("there are `{names}`")));
        }
    }
    if let Some(directory) = &args.write {
        std::fs::create_dir_all(directory).map_err(|error| Error::io(directory, &error))?;
        for (name, schema) in &schemas {
            let path = directory.join(format!("{name}.schema.json"));
            std::fs::write(&path, schemas::to_text(schema)?)
                .map_err(|error| Error::io(&path, &error))?;
            printer.note(&format!("wrote `{}`", path.display()));
        }
    } else if let (Some(_), [(_, schema)]) = (&args.name, schemas.as_slice()) {
        printer.data(&schemas::to_text(schema)?)?;
    } else {
        let all = schemas.into_iter().map(|(name, schema)| (name.into(), schema.to_value()));
        let all = serde_json::Value::Object(all.collect());
        printer.data(&format!("{all:#}"))?;
    }
    Ok(Outcome::Done)
}
