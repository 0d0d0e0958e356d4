// SPDX-License-Identifier: Apache-2.0

package results

import (
	"fmt"
	"path/filepath"
)

// Render writes results.csv, verdicts.csv, crossovers.csv, the pictures and report.md into dir, from the records alone: the same
// records give the same bytes. Each file is replaced whole or left as it was; report.md comes last, so that what it shows exists.
func (r *Run) Render(dir string) error {
	t := newTable(r)
	a := analysis{run: r, table: t, verdicts: t.verdicts(), crossovers: t.crossovers(), floors: t.noiseFloors(), drifts: t.drifts()}
	a.figures = a.plan()

	type file struct {
		name    string
		content []byte
	}
	files := []file{
		{ResultsFile, t.resultsCSV(r.Records)},
		{VerdictsFile, verdictsCSV(a.verdicts)},
		{CrossoversFile, crossoversCSV(a.crossovers)},
	}
	for _, f := range a.figures {
		png, err := f.png()
		if err != nil {
			return fmt.Errorf("draw %s: %w", f.file, err)
		}
		files = append(files, file{f.file, png})
	}
	files = append(files, file{ReportFile, a.report()})
	if err := MakeDir(dir); err != nil {
		return fmt.Errorf("render: %w", err)
	}
	for _, f := range files {
		if err := writeFile(filepath.Join(dir, f.name), f.content); err != nil {
			return err
		}
	}
	return nil
}

// analysis is all that the report and the pictures draw on.
type analysis struct {
	*table
	run        *Run
	verdicts   []Verdict
	crossovers []Crossover
	floors     []NoiseFloor
	drifts     []drift
	figures    []figure
	notes      footnotes
}
