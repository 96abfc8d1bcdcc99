// Pages opened from a folder may not read each other: there the search shows titles, without a line of each page.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
