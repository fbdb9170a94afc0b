{{- define "freshrank.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Call with (dict "root" $ "component" "triton"). */}}
{{- define "freshrank.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "freshrank.labels" -}}
{{ include "freshrank.selector" . }}
app.kubernetes.io/part-of: freshrank
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "freshrank.metadata" -}}
name: {{ include "freshrank.name" .root }}-{{ .suffix | default .component }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "freshrank.labels" . | nindent 2 }}
{{- end -}}

{{- define "freshrank.image" -}}
{{ .repository }}:{{ .tag }}{{ with .digest }}@{{ . }}{{ end }}
{{- end -}}

{{- define "freshrank.homeClaim" -}}
{{ .Values.home.existingClaim | default (printf "%s-home" (include "freshrank.name" .)) }}
{{- end -}}

{{/* The port open to every client; the other one is the publisher's alone. */}}
{{- define "freshrank.inferencePort" -}}
{{ ternary "8001" "8000" (eq .Values.triton.inferenceProtocol "grpc") }}
{{- end -}}

{{- define "freshrank.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "freshrank.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* enableServiceLinks: Kubernetes would inject FRESHRANK_TRITON_PORT=tcp://… for a Service of that name. */}}
{{- define "freshrank.pod" -}}
serviceAccountName: {{ include "freshrank.name" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  {{- include "freshrank.podSecurity" .user | nindent 2 }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "freshrank.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "freshrank.selector" . | nindent 8 }}
{{- end -}}

{{/* A changed setting must restart the pods that read it. */}}
{{- define "freshrank.settingsChecksum" -}}
freshrank/settings: {{ include (print .Template.BasePath "/settings.yaml") . | sha256sum }}
{{- end -}}

{{- define "freshrank.env" -}}
- name: HOME
  value: /tmp
- name: FRESHRANK_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ .Values.redis.existingSecret }}
      key: {{ .Values.redis.urlKey }}
{{- end -}}

{{/* Keys of the bucket, for what reads or writes it; nothing where the service account's own identity does. */}}
{{- define "freshrank.storageEnv" -}}
{{- with .Values.storage }}
{{- if .existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .accessKeyKey }}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .secretKeyKey }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "freshrank.halfOfTheCores" -}}
{{- $limit := .Values.triton.resources.limits.cpu -}}
{{- $cores := hasSuffix "m" $limit | ternary (divf (trimSuffix "m" $limit | float64) 1000) ($limit | float64) -}}
{{- max 1 (divf $cores 2 | floor | int) -}}
{{- end -}}
