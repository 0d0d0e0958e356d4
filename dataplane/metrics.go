// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"net/http"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// metricsURL is where kube-proxy, and the agent in its place, serve metrics inside their node.
const metricsURL = "http://127.0.0.1:10249/metrics"

type families map[string]*dto.MetricFamily

func proxyMetrics(ctx context.Context, site clusters.Site) (families, error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: site.DialContext}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, metricsURL, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("read the proxy's metrics on %s: %w", site.Spec().Name, err)
	}
	defer resp.Body.Close()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	f, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("parse the proxy's metrics on %s: %w", site.Spec().Name, err)
	}
	return f, nil
}

// sum adds a gauge or counter over all its labels; 0 when it is not there.
func (f families) sum(name string) float64 {
	total := 0.0
	for _, m := range f[name].GetMetric() {
		total += m.GetGauge().GetValue() + m.GetCounter().GetValue() + m.GetUntyped().GetValue()
	}
	return total
}

// NothingQueued says whether the proxy has synced everything that it was told: for each address family, its last sync ended
// after its last change was queued. Sites without a proxy have nothing queued.
func NothingQueued(ctx context.Context, site clusters.Site) (bool, error) {
	if site.ProxyCgroup() == "" {
		return true, nil
	}
	metrics, err := proxyMetrics(ctx, site)
	if err != nil {
		return false, err
	}
	synced := map[string]float64{}
	for _, m := range metrics["kubeproxy_sync_proxy_rules_last_timestamp_seconds"].GetMetric() {
		synced[labels(m)] = m.GetGauge().GetValue()
	}
	for _, m := range metrics["kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds"].GetMetric() {
		if m.GetGauge().GetValue() > synced[labels(m)] {
			return false, nil
		}
	}
	return true, nil
}

func labels(m *dto.Metric) string {
	s := ""
	for _, l := range m.GetLabel() {
		s += l.GetName() + "=" + l.GetValue() + ";"
	}
	return s
}
