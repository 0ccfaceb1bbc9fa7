"""Everything that a person sees: text, HTML, the widget; pure functions of reports, traces and sessions."""
